//! The example that README.md shows is the one that is built, and the documentation tests run it.

#[test]
fn shows_the_example_as_it_is() {
    let shown = include_str!("../README.md");
    let file = include_str!("../examples/readme.rs");
    let (_, program) =
        file.split_once("#![allow(unsafe_code)]\n\n").expect("its first lines are for this workspace");
    assert!(shown.contains(&format!("```rust\n{program}```\n")), "copy examples/readme.rs to README.md");
}
