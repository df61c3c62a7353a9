"""Does a prompt learn better? Accuracy of a linear head, prompt tuning, DePT, EPT and the others.

    python -m bench.accuracy run --data DATA
    python -m bench.accuracy report

``DATA`` holds the folders few_shot, sst2, trec and rte. ``bench/accuracy/study.py`` says what is
run: parts, tasks, seeds, methods, rates. Every finished run is one line of ``runs.jsonl`` in
``--out`` and is not done again on the same device; ``report`` reads nothing else. ``--minutes``
limits a call of ``run``; the next one goes on from the records. Exit status 3 says that runs are
left, 1 that one failed.

For a machine with a GPU and without the data and the encoder's package:

    python -m bench.accuracy pack --data DATA --out .accuracy-pack
    python -m bench.accuracy run --model .accuracy-pack/model --data .accuracy-pack/data \\
        --device cuda --workers 8 --scale 10 --minutes 8 --out OUT

The weights travel as float16.
"""
