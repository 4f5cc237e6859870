"""What this package adds to finetune."""
