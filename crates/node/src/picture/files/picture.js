// The page: asks the node once a second, and at once when something happens, and shows what it says.

import { follow, get, order, Refused } from "./node.js";
import { Vms } from "./vms.js";
import { Events, Jobs } from "./lists.js";
import { redrawAll, showLegend } from "./lanes.js";
import { clock, element, many, setClass, setText } from "./words.js";

const EVERY_MS = 1000;
/// Nobody looks at a page in the background.
const EVERY_HIDDEN_MS = 5000;

const at = (id) => document.getElementById(id);
const vms = new Vms(at("table"), at("no-vms"), give);
const jobs = new Jobs(at("jobs"), at("no-jobs"), give);
const events = new Events(at("events"), at("no-events"));

let place = null;
let node = null;
let seen = null;
let timer = null;
let asking = false;
let again = false;

/// Asks for everything, and again in a second.
async function turn() {
    if (asking) {
        again = true;
        return;
    }
    asking = true;
    clearTimeout(timer);
    try {
        const [host, list, figures, work] = await Promise.all([
            get("v1/node"),
            get("v1/vms"),
            get(`v1/figures${place === null ? "" : `?after=${place}`}`).catch(withoutFigures),
            get("v1/jobs"),
        ]);
        node = host;
        if (figures !== null) place = figures.next;
        show(list.vms, figures, work.jobs);
        back();
    } catch (why) {
        lost(why);
    }
    asking = false;
    const wait = document.hidden ? EVERY_HIDDEN_MS : EVERY_MS;
    timer = setTimeout(turn, again ? 50 : wait);
    again = false;
}

/// A node of an older release has none.
function withoutFigures(why) {
    if (why instanceof Refused && why.code === "no_route") return null;
    throw why;
}

function show(list, figures, work) {
    setText(at("host"), node.host);
    document.title = `${node.host} – Outlive`;
    setText(at("mode"), node.mode);
    setClass(at("mode"), `badge ${node.mode === "active" ? "good" : "warn"}`);
    setText(at("about"), `Outlive ${node.version}, the node runs since ${clock(node.since)}`);
    const maintain = at("maintain");
    maintain.hidden = false;
    setText(maintain, node.mode === "active" ? "Drain this host" : "End the maintenance");
    maintain.disabled = node.mode === "draining";
    jobs.show(work);
    events.show();
    vms.show(list, figures, node, new Map(work.filter((it) => it.state === "running").map((it) => [it.vm, it])));
    verdict(list);
}

/// The one look: what a failure of this host now would mean.
function verdict(list) {
    const here = list.filter((vm) => ["running", "starting"].includes(vm.state) && vm.status);
    const lostVms = here.filter((vm) => !vm.status.loss_of_this_host?.survived);
    const guarded = list.filter((vm) => vm.state === "standby" && vm.protected).length;
    const broken = list.filter((vm) => ["failed", "misdefined", "waiting", "foreign"].includes(vm.state));
    const lines = [];
    const rest = [];
    let title = "If this host failed now, nothing would be lost: no VM runs here.";
    if (here.length > 0 && lostVms.length === 0) {
        const all = here.length === 1 ? "the VM that runs here" : `all ${here.length} VMs that run here`;
        title = `If this host failed now, ${all} would go on.`;
    } else if (lostVms.length > 0) {
        title = `If this host failed now, ${lostVms.length} of ${many(here.length, "VM")} would NOT go on:`;
        for (const vm of lostVms) lines.push(`${vm.name}: ${vm.status.loss_of_this_host?.what ?? "not known"}`);
    }
    for (const vm of broken) rest.push(`${vm.name} is ${vm.state}${vm.why ? `: ${vm.why}` : ""}`);
    if (guarded > 0) rest.push(`This host protects ${many(guarded, "VM")} of other hosts.`);
    rest.push(...node.warnings);
    const box = at("verdict");
    const tone = lostVms.length > 0 ? "bad" : broken.length > 0 || node.warnings.length > 0 ? "warn" : "good";
    setClass(box, `verdict ${tone}`);
    // It is told only if it is another one.
    const text = [title, ...lines, "", ...rest].join("\n");
    if (box.dataset.text === text) return;
    box.dataset.text = text;
    const going = element("ul", {}, ...lines.map((line) => element("li", {}, line)));
    const others = rest.map((line) => element("p", {}, line));
    box.replaceChildren(element("p", { class: "title" }, title), ...(lines.length > 0 ? [going] : []), ...others);
}

function back() {
    seen = new Date();
    const link = at("link");
    setText(link, "Connected to the node");
    setClass(link, "good");
    document.body.classList.remove("stale");
}

function lost(why) {
    const link = at("link");
    const known = why instanceof Refused;
    // What a stranger may not see, he is not shown for longer.
    const unknown = known && why.status === 401;
    const what = unknown ? why.message : known ? `The node cannot be asked: ${why.message}` : "The node does not answer.";
    const old = seen === null ? "" : ` What you see is of ${clock(seen)}.`;
    setText(link, `CONNECTION LOST. ${what.replace(/\.?$/, ".")}${old}${unknown ? "" : " It is tried again."}`);
    setClass(link, "bad");
    document.body.classList.add("stale");
}

/// Asks the operator, and then gives an order. `question` has title, text, button, route and body; with `now` there is a choice.
async function give(question) {
    const body = await asked(question);
    if (body === null) return;
    const said = at("said");
    said.replaceChildren();
    try {
        await order(question.route, body);
        tell(`${question.title.replace(/\?$/, "")}: the order was given`);
    } catch (why) {
        const remedy = why.remedy ? `; ${why.remedy}` : "";
        const close = element("button", { type: "button" }, "Close");
        close.addEventListener("click", () => said.replaceChildren());
        const text = element("p", {}, `${question.title.replace(/\?$/, "")}: not done: ${why.message}${remedy}`);
        said.replaceChildren(element("div", { class: "verdict bad" }, text, close));
    }
    turn();
}

/// The answer: what goes with the order, or `null` for no.
function asked({ title, text, button, body, now }) {
    if (!title.endsWith("?")) return Promise.resolve(body);
    const dialog = at("ask");
    setText(at("ask-title"), title);
    setText(at("ask-text"), text);
    setText(at("ask-yes"), button);
    at("ask-more").hidden = !now;
    at("ask-now").checked = false;
    dialog.returnValue = "";
    dialog.showModal();
    at("ask-no").focus();
    return new Promise((done) => {
        dialog.addEventListener(
            "close",
            () => {
                const more = now && at("ask-now").checked ? { ...body, now: true } : body;
                done(dialog.returnValue === "yes" ? more : null);
            },
            { once: true },
        );
    });
}

/// Tells a screen reader.
function tell(text) {
    setText(at("news"), text);
}

at("ask-yes").addEventListener("click", () => at("ask").close("yes"));
at("ask-no").addEventListener("click", () => at("ask").close("no"));
at("maintain").addEventListener("click", () => {
    const host = node.host;
    give(
        node.mode === "active"
            ? {
                  title: `Drain ${host}?`,
                  text: "All VMs that run here move to their standbys, one after another, and none is started here until the " +
                      "maintenance ends. If one does not go, the host is active again.",
                  button: "Drain",
                  route: "v1/node/drain",
                  body: {},
              }
            : {
                  title: `End the maintenance of ${host}?`,
                  text: "VMs may be started here again. They stay where they are.",
                  button: "End the maintenance",
                  route: "v1/node/undrain",
              },
    );
});
document.addEventListener("visibilitychange", () => document.hidden || turn());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
addEventListener("resize", redrawAll);

showLegend(at("legend"));
turn();
follow(
    (event) => {
        events.add(event);
        vms.mark(event);
        // Not what was before this page.
        if (seen !== null && Date.parse(event.time) > seen - 2 * EVERY_HIDDEN_MS) {
            tell(event.vm ? `${event.vm}: ${event.text}` : event.text);
            turn();
        }
    },
    () => {
        events.reset();
        turn();
    },
);
