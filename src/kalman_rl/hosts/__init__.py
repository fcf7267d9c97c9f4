"""Where training happens: thin adapters to TRL and verl. Imported only when used."""
