#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lora_compress_core::fuzzing::pattern(data));
