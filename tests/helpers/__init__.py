"""What tests share: miniatures of data sets, servers on 127.0.0.1, tiny models."""
