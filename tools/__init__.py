"""What builds and checks this repository; nothing here is shipped in the wheel."""
