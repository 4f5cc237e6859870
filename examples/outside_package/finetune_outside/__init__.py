"""Extensions of finetune in a separate package."""
