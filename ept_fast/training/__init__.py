"""Training, evaluation and prediction of prompts on a frozen encoder; needs the ``train`` extra."""
