"""A live scheduler that knows pools. All that touches distributed's scheduler internals is here."""
