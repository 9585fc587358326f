"""A model without weights, sharded over ranks; its loss and its gradient."""
