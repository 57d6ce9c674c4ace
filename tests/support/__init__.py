"""What tests share: oracles, tiny worlds, checks."""
