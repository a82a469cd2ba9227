"""The model that is trained: a frozen base in 4 bits with an adapter, loaded, recorded, and loaded again."""
