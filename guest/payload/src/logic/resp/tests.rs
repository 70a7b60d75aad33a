use proptest::prelude::*;

use super::parser::{MAX_ARGS, MAX_LINE};
use super::*;

type Command = Vec<Vec<u8>>;

/// The result of a whole byte stream: its commands and the error that ended it.
fn parse(pieces: &[&[u8]]) -> (Vec<Command>, Option<ParseError>) {
    let mut parser = Parser::default();
    let mut commands = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        loop {
            match parser.feed(rest) {
                Ok(Fed::More) => break,
                Ok(Fed::Command(len)) => {
                    commands.push(parser.args().from(0).map(<[u8]>::to_vec).collect());
                    rest = &rest[len..];
                }
                Err(error) => return (commands, Some(error)),
            }
        }
    }
    (commands, None)
}

fn encode(command: &Command) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
    for arg in command {
        bytes.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        bytes.extend_from_slice(arg);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// Cuts `bytes` at the given places.
fn cut<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    places.extend([0, bytes.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect()
}

fn command() -> impl Strategy<Value = Command> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6)
}

/// Streams that look like requests, so that a random one gets past the first byte.
fn fragment() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        command().prop_map(|command| encode(&command)),
        prop::sample::select(vec![
            "*",
            "$",
            "\r\n",
            "\n",
            "*2\r\n",
            "$3\r\n",
            "*-1\r\n",
            "*0\r\n",
            "$-1\r\n",
            "*9999999\r\n",
            "\"",
            "'",
            "\\x4",
            "get \"a b\" 'c\\'d'\r\n",
            "  ping  \n",
            "*1\r\n$99999999999999999999\r\n",
            "*1\r\n:1\r\n",
            "*01\r\n",
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..20),
    ]
}

proptest! {
    #[test]
    fn every_command_comes_out_as_it_went_in(commands in prop::collection::vec(command(), 0..8)) {
        let stream: Vec<u8> = commands.iter().flat_map(encode).collect();
        prop_assert_eq!(parse(&[&stream]), (commands, None));
    }

    #[test]
    fn pieces_do_not_matter(
        fragments in prop::collection::vec(fragment(), 0..8),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let stream = fragments.concat();
        let whole = parse(&[&stream]);
        prop_assert_eq!(&parse(&cut(&stream, &cuts)), &whole);
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        prop_assert_eq!(&parse(&bytes), &whole);
    }

    #[test]
    fn numbers_are_read_as_redis_reads_them(value in any::<i64>(), junk in "[-+ 0-9a-z]{0,4}") {
        prop_assert_eq!(number(value.to_string().as_bytes()), Some(value));
        let expected = junk.parse::<i64>().ok().filter(|value| value.to_string() == junk);
        prop_assert_eq!(number(junk.as_bytes()), expected);
        let mut buffer = [0; 20];
        let text = value.to_string();
        prop_assert_eq!(decimal(value, &mut buffer), text.as_bytes());
    }
}

fn args(words: &[&str]) -> Command {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

#[test]
fn inline_commands_are_split_as_by_redis() {
    for (line, expected) in [
        ("set a 1\r\n", Ok(args(&["set", "a", "1"]))),
        ("  set\ta   1  \n", Ok(args(&["set", "a", "1"]))),
        ("echo \"a b\\n\\x41\\\"\"\n", Ok(args(&["echo", "a b\nA\""]))),
        ("echo 'it\\'s \\n'\n", Ok(args(&["echo", "it's \\n"]))),
        ("echo \"\" ''\n", Ok(args(&["echo", "", ""]))),
        ("echo \"open\n", Err(ParseError::UnbalancedQuotes)),
        ("echo \"a\"b\n", Err(ParseError::UnbalancedQuotes)),
    ] {
        let expected = match expected {
            Ok(command) => (vec![command], None),
            Err(error) => (vec![], Some(error)),
        };
        assert_eq!(parse(&[line.as_bytes()]), expected, "{line:?}");
    }
    assert_eq!(parse(&[b"\r\n\r\nping\r\n"]), (vec![args(&["ping"])], None), "empty lines are ignored");
}

#[test]
fn protocol_errors_are_those_of_redis() {
    for (stream, text) in [
        ("*x\r\n", "Protocol error: invalid multibulk length"),
        ("*70000\r\n", "Protocol error: invalid multibulk length"),
        ("*1\r\n:5\r\n", "Protocol error: expected '$', got ':'"),
        ("*1\r\n$x\r\n", "Protocol error: invalid bulk length"),
        ("*1\r\n$-1\r\n", "Protocol error: invalid bulk length"),
        ("*1\r\n$16777217\r\n", "Protocol error: invalid bulk length"),
        ("*1\r\n$111111111111111111111111111111111111111111", "Protocol error: too big bulk count string"),
        ("*111111111111111111111111111111111111111111", "Protocol error: too big mbulk count string"),
    ] {
        let (commands, error) = parse(&[stream.as_bytes()]);
        assert_eq!((commands.len(), error.unwrap().to_string().as_str()), (0, text), "{stream:?}");
    }
}

#[test]
fn limits_hold_for_endless_input() {
    let mut parser = Parser::default();
    assert_eq!(parser.feed(&vec![b'x'; MAX_LINE]), Ok(Fed::More));
    assert_eq!(parser.feed(b"x"), Err(ParseError::InlineTooLong));

    let mut parser = Parser::default();
    parser.feed(format!("*{MAX_ARGS}\r\n").as_bytes()).unwrap();
    let header = format!("${MAX_BULK}\r\n").into_bytes();
    let chunk = vec![b'x'; 1 << 20];
    let mut fed = 0;
    let error = loop {
        assert!(fed < 4 * MAX_BULK, "took more than one command may hold");
        if let Err(error) = parser.feed(&header) {
            break error;
        }
        for _ in 0..MAX_BULK / chunk.len() {
            fed += chunk.len();
            if parser.feed(&chunk).is_err() {
                break;
            }
        }
        if let Err(error) = parser.feed(b"\r\n") {
            break error;
        }
    };
    assert_eq!(error, ParseError::CommandTooLong);
    assert!(parser.footprint() <= 4 * MAX_BULK + (1 << 20), "{} bytes held", parser.footprint());
}

#[test]
fn a_long_command_gives_its_memory_back() {
    let mut parser = Parser::default();
    let long = encode(&vec![b"set".to_vec(), b"k".to_vec(), vec![7; 1 << 20]]);
    assert_eq!(parser.feed(&long), Ok(Fed::Command(long.len())));
    parser.finish();
    assert!(parser.footprint() < 100_000, "{} bytes kept", parser.footprint());
}

#[test]
fn output_is_bounded_and_stays_one_line() {
    let mut out = Reply::default();
    out.error(format_args!("ERR two\r\nlines"));
    assert_eq!(out.pending(), b"-ERR two  lines\r\n");
    out.advance(1000);
    assert!(out.pending().is_empty());
    let megabyte = vec![0; 1 << 20];
    for _ in 0..40 {
        out.bulk(&megabyte);
    }
    assert!(out.overflowed());
    assert!(out.footprint() <= 64 << 20);
}
