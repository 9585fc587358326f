"""What comes in, looked at before anything is computed: weights, configuration, data, the model itself, the API's arguments."""
