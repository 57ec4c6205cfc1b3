"""Fine-tuning a trained model: on texts with labels, and on conversations."""
