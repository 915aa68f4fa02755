"""What a method would cost on many GPUs, on paper: ``fastguard plan``.

``hardware``      data sheets of GPUs and of the nodes they come in
``architecture``  a model's parameters and products, from its configuration
``setting``       the job: model, GPUs, batch, precision, sharding, efficiencies
``passes``        one forward and one backward of the model: flops, bytes, what is alive
``parts``         everything else that a step does with weights and with the vocabulary
``cost``          what a method says of its step, here and as published: ``defenses/NAME/cost.py``, by its entry
``estimate``      adds up: memory, step time, the largest batch that fits
``show``          tables and JSON

No method is named here: the registry knows which there are. Everything here is arithmetic on Python numbers.
Nothing is measured, and torch is not needed.
"""
