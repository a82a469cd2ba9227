"""Publishing an adapter on the Hub."""
