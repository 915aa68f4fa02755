"""First contact with a GPU: every op checked against float64 on it, then timed beside peers at an 8B model's shapes.

``python -m fastguard.bench --gpu``, also ``fastguard bench --gpu``; docs/gpu.md says how to read what comes out.

``agreement``, ``checks``   whether kernels compute what their specifications say; what ``proof.py`` keeps
``shapes``, ``zipf``        how large, and hidden states that read as a model's do
``roofs``, ``head``, ``peers``, ``states``, ``steps``   what is timed: `work.Group` each
``tune``                    block shapes of the matrix kernels: candidates, and the table that they make
``timing``                  CUDA events, warm-up by time, contenders in alternating order, clocks
``session``, ``child``      groups one after another, each in a process of its own, until the time is up
``journal``, ``table``      a line a result as it comes; the table that is made of them
"""
