//! The page in a real browser, at a node with processes that run nothing.
//!
//! With `OUTLIVE_SHOTS=DIR` the tests write pictures there, for people to look at.

mod chromium;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use self::chromium::Chromium;
use crate::api::{Server, serve};
use crate::jobs::JobState;
use crate::node::Node;
use crate::page::{self, Page};
use crate::testing::life::{self, Kind, Life};
use crate::testing::{World, wait};
use crate::view::State;

struct Host {
    world: World,
    node: Arc<Node>,
    api: Option<Server>,
    page: Page,
    life: Option<Life>,
}

impl Host {
    fn new() -> Self {
        let world = World::new();
        let node = world.node();
        let socket = world.folder.path().join("node.api");
        let api = Some(serve(&node, &socket, None).unwrap());
        let page = page::serve("127.0.0.1:0".parse().unwrap(), &socket).unwrap();
        Self { world, node, api, page, life: None }
    }

    /// Defines a VM of two hosts, and starts it; `says` is more of its status.
    fn vm(&self, name: &str, number: u8, says: &serde_json::Value) {
        self.world.tell(name, "says", &says.to_string());
        let definition = format!(
            "restart-limit = 1\narbiter = 'file:/x'\nlisten = '10.0.0.1:70{number:02}'\n\
             standby = ['hostb:70{number:02}']\ndisk = ['path=/no/{number}']"
        );
        self.node.define(name, &definition).unwrap();
        self.node.begin_start(name).unwrap();
    }

    /// VMs in states of every kind.
    fn populate(&mut self) {
        self.vm("web", 1, &life::protected("hostb:7001"));
        self.world.tell("db", "bare", "");
        self.world.tell("db", "why", "no standby has come to <img src=x onerror=alert(1)> yet");
        self.vm("db", 2, &life::unprotected());
        self.world.tell("mail", "role", "standby");
        self.vm("mail", 3, &life::standby("hostb:7003"));
        self.world.tell("old", "refuses", "outlive: cannot read /no/kernel: no such file; give another one");
        self.vm("old", 4, &json!({}));
        self.node.define("spare", "memory = '1G'").unwrap();
        for (vm, state) in [
            ("web", State::Running),
            ("db", State::Running),
            ("mail", State::Standby),
            ("old", State::Failed),
            ("spare", State::Stopped),
        ] {
            wait(&self.node, vm, |it| it.state == state);
        }
        let lives = [("web", Kind::Guarded), ("db", Kind::Bare), ("mail", Kind::Standby)];
        self.life = Some(Life::new(&self.node, &lives.map(|(vm, kind)| (vm.to_owned(), kind))));
    }
}

/// Where pictures go, if anybody wants some.
fn shots() -> Option<PathBuf> {
    std::env::var_os("OUTLIVE_SHOTS").map(PathBuf::from)
}

fn shot(browser: &mut Chromium, name: &str) {
    if let Some(folder) = shots() {
        browser.shot(&Path::new(&folder).join(name));
    }
}

/// The cell of a VM under a heading, as text.
fn cell(vm: &str, heading: &str) -> String {
    format!(
        "[...document.querySelectorAll('#table tbody')].find(it => it.querySelector('th').textContent === '{vm}')\
         .querySelector('[data-label=\"{heading}\"]').textContent"
    )
}

const WINDOW: (u32, u32) = (1280, 900);

#[test]
fn an_operator_sees_every_vm_and_hands_one_over() {
    let Some(mut browser) = Chromium::start() else { return };
    let mut host = Host::new();
    host.populate();
    browser.look(WINDOW.0, WINDOW.1, "light");
    browser.open(&host.page.link);
    for (vm, heading, says) in [
        ("web", "State", "running"),
        ("web", "Protected", "✓ protected"),
        ("web", "If this host failed now", "✓ survived"),
        ("web", "Behind", "commit 4 ms ago, 2 in flight"),
        ("web", "Who protects whom", "hosta (here) runs it ▸ hostb:7001 protects it"),
        ("db", "Protected", "UNPROTECTED"),
        // What a node says is text, whatever it says.
        ("db", "Protected", "<img src=x onerror=alert(1)>"),
        ("db", "If this host failed now", "NOT SURVIVED"),
        ("mail", "State", "standby"),
        ("mail", "Who protects whom", "hostb:7003 runs it ▸ hosta (here) protects it"),
        ("old", "State", "failed"),
        ("old", "Protected", "cannot read /no/kernel"),
        ("spare", "State", "stopped"),
    ] {
        browser.until(&format!("{}.includes({})", cell(vm, heading), json!(says)));
    }
    browser.until("document.querySelector('#verdict').innerText.includes('1 of 2 VMs would NOT go on')");
    browser.until("document.querySelector('#link').textContent === 'Connected to the node'");
    // The events before the page are there, the newest first.
    browser.until("document.querySelector('#events li').textContent.match(/[0-9:]+ (web|db|mail|old)/)");
    // By name: db, mail, old, spare, web. Pixels of the bars' colour are drawn where there are figures, and nowhere else.
    let drawn = "[...document.querySelectorAll('#table tbody')].map(it => [...it.querySelectorAll('canvas')].map(it => { const \
                 data = it.getContext('2d').getImageData(0, 0, it.width, it.height).data; let bars = 0; for (let at = 0; at < \
                 data.length; at += 4) bars += data[at] === 0x2f && data[at + 1] === 0x6f && data[at + 2] === 0xb3; return \
                 bars > 100 ? 'x' : '-'; }).join('')).join()";
    browser.until(&format!("{drawn} === '----x,x,,,xxxxx'"));
    let told = "document.querySelector('#table tbody:last-child canvas').getAttribute('aria-label')";
    let told = browser.value(told);
    assert!(told.as_str().unwrap().contains("Pause of web: now "), "{told}");
    // Only the memory of a protected VM that runs here is looked at.
    let cells = "[...document.querySelectorAll('#table tbody')].map(it => it.querySelector('.heat').hidden ? 0 : \
                 it.querySelectorAll('.cells > span').length).join()";
    browser.until(&format!("{cells} === '0,0,0,0,130'"));
    let of_web = "document.querySelector('#table tbody:last-child .heat')";
    for expression in [
        ".innerText.includes('three quarters of them are in 128 MiB at 0x8c000000')",
        ".innerText.includes('130 cells of 32 MiB, by address')",
        ".querySelector('.cells').getAttribute('aria-label').startsWith('Memory of web: ')",
        ".querySelectorAll('.heat-5[title*=\"pages a second\"]').length > 0",
        ".querySelectorAll('.edge').length === 1",
        ".querySelector('.cells').children[96].title.startsWith('0x100000000 to 0x101ffffff (32 MiB): ')",
        ".querySelector('.cells').children[65].title.endsWith(': nothing written')",
    ] {
        assert_eq!(browser.value(&format!("{of_web}{expression}")), true, "{expression}");
    }
    // Each step has a colour of its own, in either scheme.
    let colours = format!(
        "new Set([...{of_web}.querySelectorAll('.scale span')].map(it => getComputedStyle(it).backgroundColor)).size"
    );
    for scheme in ["dark", "light"] {
        browser.look(WINDOW.0, WINDOW.1, scheme);
        assert_eq!(browser.value(&colours), 7, "{scheme}");
    }
    shot(&mut browser, "light.png");

    // With the keyboard alone. Who presses Enter twice has not handed it over.
    let begun = host.node.jobs.list().len();
    browser.value("document.querySelector('#table tbody:last-child [data-order=hand_over]').focus()");
    browser.press("Enter", 13);
    browser.until("document.querySelector('#ask').open && document.activeElement.id === 'ask-no'");
    browser.until("document.querySelector('#ask').innerText.includes('Hand web over to hostb:7001?')");
    shot(&mut browser, "question.png");
    browser.press("Enter", 13);
    browser.until("!document.querySelector('#ask').open");
    browser.press("Enter", 13);
    browser.until("document.querySelector('#ask').open");
    assert_eq!(host.node.jobs.list().len(), begun, "nobody has said yes");
    browser.press("Tab", 9);
    browser.until("document.activeElement.id === 'ask-yes'");
    browser.press("Enter", 13);
    browser.until("document.querySelector('#jobs tbody tr').innerText.includes('Hand-over web')");
    browser.until("document.querySelector('#jobs tbody tr').innerText.includes('succeeded')");
    browser.until("document.querySelector('#jobs tbody tr').innerText.includes('the standby has the VM')");
    browser.until(&format!("{}.includes('standby')", cell("web", "State")));
    browser.until("document.querySelector('#events').innerText.includes('has succeeded')");
    let last = host.node.jobs.list().pop().unwrap();
    assert_eq!((last.vm.as_deref(), last.state), (Some("web"), JobState::Succeeded));
    assert_eq!(host.node.jobs.list().len(), begun + 1);
    assert_eq!(browser.complaints, Vec::<String>::new());
}

/// A refusal says why, and what helps.
#[test]
fn what_is_refused_is_said_and_a_node_that_goes_and_comes_is_noticed() {
    let Some(mut browser) = Chromium::start() else { return };
    let mut host = Host::new();
    host.populate();
    browser.look(WINDOW.0, WINDOW.1, "dark");
    browser.open(&host.page.link);
    browser.until(&format!("{}.includes('running')", cell("db", "State")));
    let order = "document.querySelector('#table tbody [data-order=hand_over]')";
    browser.until(&format!(
        "{order}.getAttribute('aria-disabled') === 'true' && {order}.title.includes('not protected')"
    ));
    // Somebody else is quicker.
    browser.value("document.querySelector('#table tbody [data-order=stop]').click()");
    browser.until("document.querySelector('#ask').open");
    host.node.begin_drain(false, std::time::Duration::from_secs(60)).unwrap();
    browser.value("document.querySelector('#ask-yes').click()");
    browser.until("document.querySelector('#said').innerText.includes('wait for the job, or cancel it')");
    browser.until("document.querySelector('#mode').textContent === 'draining'");
    browser.until("document.querySelector('#jobs progress').offsetWidth > 0");
    shot(&mut browser, "refused-dark.png");
    browser.value("[...document.querySelectorAll('#jobs button')].find(it => it.offsetWidth > 0).click()");
    browser.until("document.querySelector('#jobs tbody tr').innerText.includes('cancelled')");
    browser.until("document.querySelector('#mode').textContent === 'active'");

    host.api = None;
    browser.until("document.querySelector('#link').textContent.startsWith('CONNECTION LOST')");
    browser.until("document.body.classList.contains('stale')");
    shot(&mut browser, "lost.png");
    host.node.define("late", "memory = '1G'").unwrap();
    let socket = host.world.folder.path().join("node.api");
    host.api = Some(serve(&host.node, &socket, None).unwrap());
    browser.until("document.querySelector('#link').textContent === 'Connected to the node'");
    browser.until(&format!("{}.includes('stopped')", cell("late", "State")));
    // What happened meanwhile is told, and nothing twice.
    let told = host.node.feed().after(0).entries.len();
    browser.until(&format!("document.querySelectorAll('#events li').length === {told}"));
    assert_eq!(browser.complaints, Vec::<String>::new());
}

#[test]
fn a_narrow_window_and_a_screen_reader_have_all_of_it() {
    let Some(mut browser) = Chromium::start() else { return };
    let mut host = Host::new();
    host.populate();
    browser.open(&host.page.link);
    for (width, scheme) in [(400, "light"), (1280, "dark")] {
        browser.look(width, 900, scheme);
        browser.until(&format!("{}.includes('running')", cell("web", "State")));
        browser.until("document.querySelectorAll('#table canvas').length === 11");
        browser.until(&format!("document.documentElement.scrollWidth <= {width}"));
        for (role, name) in [
            ("table", "VMs of this host"),
            ("row", ""),
            ("rowheader", "web"),
            ("columnheader", "If this host failed now"),
            // In a narrow window each cell has its heading beside it.
            ("cell", if width == 400 { "Protected ✓ protected" } else { "✓ protected" }),
            ("button", "Hand over web"),
            ("button", "Hand over db (it is not protected"),
            ("image", "Pause of web: now"),
            ("image", "Memory of web: "),
        ] {
            browser.until_role(role, name);
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        shot(&mut browser, if width == 400 { "narrow.png" } else { "dark.png" });
    }
    // A stranger's script does not run, nor one that came in as text.
    browser.value(
        "document.body.append(Object.assign(document.createElement('script'), { text: 'window.ran = 1' }))",
    );
    assert_eq!(browser.value("typeof window.ran"), "undefined");
}
