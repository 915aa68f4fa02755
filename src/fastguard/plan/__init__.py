"""What a defense would cost on many GPUs, on paper: ``fastguard plan``.

``hardware``      data sheets of GPUs and of the nodes they come in
``architecture``  a model's parameters and products, from its configuration
``setting``       the job: model, GPUs, batch, precision, sharding, efficiencies
``passes``        one forward and one backward of the model: flops, bytes, what is alive
``parts``         everything else that a step does with weights and with the vocabulary
``defenses``      what a step of each defense consists of here; ``published``: in the published code
``estimate``      adds up: memory, step time, the largest batch that fits
``show``          tables and JSON

Everything here is arithmetic on Python numbers. Nothing is measured, and torch is not needed.
"""
