//! The command line.

pub(crate) const HELP: &str = "\
Live migration of a small VM over a socket, once with outlive-dirty and once with a bitmap for each slot, and a
comparison of both memories after each.

Usage: migrate [OPTIONS]

  --gib LIST        address space of the VM, GiB, from 1 to 1024 [1,64]
  --percent LIST    share of the touched pages that the guest writes in a round, percent [0.1,1,10]
  --touched PAGES   pages that the guest ever writes, evenly spread over all of memory [50000]
  --rounds N        rounds of pre-copy after the base copy [6]
  --round-ms MS     time from round to round [100]
  --streams N       connections, each with a thread and a share of all pages [2]
  --vcpus N         vCPUs [1]
  --exact           turn tracking on before the guest runs, with a trigger of twice a round's pages that KVM enforces
  --json FILE       write a row for each figure, one JSON object a line
  -h, --help        this text

Examples:
  migrate                                    both sizes, all three shares
  migrate --gib 1,64,512 --json rows.jsonl   memory is sparse: 512 GiB cost what the guest touches, and 1 GiB for KVM
  migrate --gib 1 --percent 1 --rounds 2     the shortest look
";

#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) gib: Vec<u64>,
    /// Thousandths of the touched pages.
    pub(crate) permille: Vec<u64>,
    pub(crate) touched: u64,
    pub(crate) rounds: usize,
    pub(crate) round_ms: u64,
    pub(crate) streams: u32,
    pub(crate) vcpus: u64,
    pub(crate) exact: bool,
    pub(crate) json: Option<String>,
}

impl Options {
    /// None if help was asked for; an error is one line for the user.
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
        let mut options = Options {
            gib: vec![1, 64],
            permille: vec![1, 10, 100],
            touched: 50_000,
            rounds: 6,
            round_ms: 100,
            streams: 2,
            vcpus: 1,
            exact: false,
            json: None,
        };
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{name} wants a value"));
            match name.as_str() {
                "-h" | "--help" => return Ok(None),
                "--gib" => options.gib = list(&name, &value()?, 1.0, (1.0, 1024.0))?,
                "--percent" => options.permille = list(&name, &value()?, 10.0, (0.1, 100.0))?,
                "--touched" => options.touched = number(&name, &value()?, 1000.0, 10e6)? as u64,
                "--rounds" => options.rounds = number(&name, &value()?, 1.0, 1000.0)? as usize,
                "--round-ms" => options.round_ms = number(&name, &value()?, 1.0, 60e3)? as u64,
                "--streams" => options.streams = number(&name, &value()?, 1.0, 64.0)? as u32,
                "--vcpus" => options.vcpus = number(&name, &value()?, 1.0, 16.0)? as u64,
                "--exact" => options.exact = true,
                "--json" => options.json = Some(value()?),
                _ => return Err(format!("there is no option {name}; try --help")),
            }
        }
        let least = options.gib.iter().min().copied().unwrap_or(1);
        if options.touched * 4096 > (least << 30) / 2 {
            return Err(format!("--touched {} pages do not fit into half of {least} GiB", options.touched));
        }
        Ok(Some(options))
    }
}

fn number(name: &str, text: &str, from: f64, to: f64) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if from <= number && number <= to => Ok(number),
        _ => Err(format!("{name} wants a number from {from} to {to}, not {text:?}")),
    }
}

fn list(name: &str, text: &str, times: f64, (from, to): (f64, f64)) -> Result<Vec<u64>, String> {
    text.split(',').map(|part| Ok((number(name, part, from, to)? * times).round() as u64)).collect()
}
