"""Accuracy of prompt tuning, DePT and EPT at one budget of trainable parameters, on real tasks.

    python -m bench.accuracy run --data DATA --out bench/results/accuracy
    python -m bench.accuracy timing --data DATA --out bench/results/accuracy
    python -m bench.accuracy report --out bench/results/accuracy

``DATA`` holds the folders sst2, trec and cola of ``<split>.jsonl`` files. ``run`` chooses each
method's learning rates on held-out training rows, with one grid for all methods, then trains with
three seeds on all training rows and evaluates once on the rows kept for that. Every finished run is
one line of ``runs.jsonl`` and is not done again on the same device; ``report`` reads nothing else.
``--minutes`` limits a call of ``run``; the next one goes on from the records. Exit status 3 says
that runs are left, 1 that one failed.

For a machine with a GPU and without the data and the encoder's package:

    python -m bench.accuracy pack --data DATA --out .accuracy-pack
    python -m bench.accuracy run --model .accuracy-pack/model --data .accuracy-pack/data \\
        --device cuda --workers 8 --minutes 3 --out OUT

The weights travel as float16 and are float32 again when they are loaded; training is in float32.
"""
