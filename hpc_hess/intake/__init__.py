"""What comes in, looked at before anything is computed: weights, configuration, data, model, the API's arguments."""
