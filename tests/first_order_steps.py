"""First-order steps for tests: settings of each rule, and states of its moments."""

MOMENTS = {"adamw": 2, "sgd": 1, "adagrad": 1}
SETTINGS = {
    "adamw": {
        "sign": 1.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "decay": 0.999,
        "step_size": 0.01,
        "root_correction": 3.0,
        "eps": 1e-8,
        "feedback": 9.0,
        "stochastic": True,
    },
    "sgd": {
        "sign": 1.0,
        "weight_decay": 0.01,
        "momentum": 0.9,
        "share": 0.9,
        "nesterov": True,
        "lr": 0.1,
        "feedback": 9.0,
        "stochastic": True,
    },
    "adagrad": {"sign": 1.0, "weight_decay": 0.01, "step_size": 0.1, "eps": 1e-10, "stochastic": True},
}
