"""Where training happens: thin adapters to TRL (and later verl). Imported only when used."""
