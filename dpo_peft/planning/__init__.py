"""How much memory training takes, and how to run a step within it, predicted from shapes."""
