"""What spans several attachments or phases: one plain function a file, over sites, methods, chains and tuned models."""
