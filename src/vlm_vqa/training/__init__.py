"""Fine-tuning: data order, optimizer, distributed start and its assertions, checkpoints, the Trainer's set-up."""
