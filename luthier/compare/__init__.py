"""Compare ways of tuning one model on one task at equal budget, and say in plain words which pays off."""
