"""infra: money, machines and processes around the training; never imports torch."""
