"""The parts of the simulated AWS that `workers.simulator` serves and `workers.world` computes: pure, each of them."""
