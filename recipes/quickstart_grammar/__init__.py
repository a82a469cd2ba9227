"""The grammar that writes the text on which `recipes/build_quickstart_model.py` trains the bundled model."""
