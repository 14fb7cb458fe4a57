"""How callbacks decide by a logged metric."""
