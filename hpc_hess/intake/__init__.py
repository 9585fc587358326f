"""What comes in, looked at before anything is computed: weights, configuration, data, the model, the API's arguments."""
