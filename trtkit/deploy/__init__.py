"""Deploy: start, watch and stop Triton on a target (`local`, `docker`)."""
