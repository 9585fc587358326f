"""What tests share: models, data, real ranks, launched runs, and references to compare with."""
