"""Training, evaluation and prediction of prompts on frozen models; needs the ``train`` extra."""
