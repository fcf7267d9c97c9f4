"""How far a sampler is from the trainer that it samples for, and which correction keeps the gradient."""
