"""Pictures for people: how a training went, and what a model finds and does not find."""
