"""What tests share: models, data, runs, servers. Tests import this, never one another."""
