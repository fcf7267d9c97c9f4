"""REPPO beside PPO on gymnasium's control tasks, its ablations, and two bridges to language models."""
