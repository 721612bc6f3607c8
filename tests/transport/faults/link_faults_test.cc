// test placeholder
