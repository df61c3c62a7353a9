"""Serve one frozen decoder with many adapters over HTTP: FastAPI, uvicorn and an ``EPTBank``.

    python -m examples.server --model FOLDER_OR_ID --adapters FOLDER

Run from the root of a clone, with ``pip install '.[train,serve]'``. Each folder in FOLDER that
holds an adapter for causal language modelling, saved by ``save_pretrained`` or ``ept-fast train``,
is a task by its own name. Then:

    curl http://127.0.0.1:8000/adapters
    curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' \\
        -d '{"adapter": "helpdesk", "text": "How late are you open?", "stream": true}'

Requests of any tasks that wait at the same time become one batch, each row behind its own adapter.
A batch runs to its end before the next one begins. ``python -m examples.server.load`` measures what
that brings.

Not there: TLS, keys, rates per client. A server that others can reach belongs behind a proxy.
"""
