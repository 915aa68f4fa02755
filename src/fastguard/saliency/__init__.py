"""Which parameters safety rests on: scores summed in place during the backward pass, and what is done with them."""
