"""Adapters for hosts that take a loss by registry or import path; each imports its host when it is called."""
