"""evaluation.benchmarks: tasks of lm-evaluation-harness that lie in files of the user's, asked of the model before and after training."""
