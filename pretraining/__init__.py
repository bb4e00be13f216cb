"""Model, configuration, schedule, trainer, evaluation and run record of the pretraining bench."""
