"""An HTTP endpoint that speaks OpenAI's protocol, over the engine of `inference`."""
