"""Evaluation: win rates, reward-model metrics, held-out loss and few-shot tasks, and the report."""
