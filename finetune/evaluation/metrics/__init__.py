"""The metrics. Each is one file with a subclass of `finetune.evaluation.base.Metric`."""
