// One device at length: what is the matter, what became of its samples, its link and machine, its last events.

import { address } from "./address.js";
import { bytes, capital, clock, figure, node, span, whole } from "./format.js";
import { help, since } from "./trouble.js";

const EVERY_MS = 2000;
const dialog = document.getElementById("device");
const by = (id) => document.getElementById(id);

export class DeviceView {
  constructor(fleet) {
    this.fleet = fleet;
    this.open = "";
    by("d-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => { this.open = ""; address.choose({ device: "" }); });
    address.addEventListener("change", () => this.follow());
    setInterval(() => { if (this.open && !document.hidden) this.ask(); }, EVERY_MS);
    this.follow();
  }

  follow() {
    const wanted = address.chosen.device;
    if (wanted === this.open) return;
    this.open = wanted;
    if (!wanted) { if (dialog.open) dialog.close(); return; }
    if (!dialog.open) dialog.showModal();
    by("d-name").textContent = wanted.slice(wanted.indexOf("/") + 1);
    this.ask();
  }

  async ask() {
    const at = this.open.indexOf("/");
    const query = new URLSearchParams({ tier: this.open.slice(0, at), name: this.open.slice(at + 1) });
    try {
      const answer = await fetch(`api/device?${query}`, { cache: "no-store", signal: AbortSignal.timeout(20000) });
      const told = await answer.json();
      if (this.fleet.view) this.show(told);
    } catch { /* the page's own notice says that nobody answers */ }
  }

  show({ device, events }) {
    by("d-gone").hidden = device != null;
    by("d-body").hidden = device == null;
    if (device == null) return;
    const view = this.fleet.view, now = view.now_unix_s;
    by("d-sub").textContent = `${device.tier} · ${device.state} · last seen ${span(now - device.heard_unix_s)} ago`;
    by("d-troubles").replaceChildren(...(device.troubles ?? []).map((trouble) => {
      const line = node("li", trouble.severe ? "severe" : "");
      line.append(node("b", "", trouble.title), `: ${trouble.words}, ${since(trouble, now)} `, help(trouble.title));
      return line;
    }));
    by("d-well").hidden = (device.troubles ?? []).length > 0;
    facts("d-samples", [
      ["Read", whole(device.samples_read ?? 0)], ["Forwarded", whole(device.samples ?? 0)], ["Held out", whole(device.samples_held_out ?? 0)],
      ...(device.samples_waiting ? [["Wait for a label", whole(device.samples_waiting)]] : []),
      ...Object.entries(device.left_out ?? {}).map(([why, count]) => [capital(why), whole(count)]),
      ...(device.samples_dropped ? [["Dropped by the full outbox", whole(device.samples_dropped)]] : []),
      ...(device.samples_lost ? [["Lost with the trainer's state", whole(device.samples_lost)]] : []),
      ...(device.batches_refused ? [["Batches refused", whole(device.batches_refused)]] : []),
    ]);
    facts("d-link", [
      ["Sent", bytes(device.bytes_up ?? 0)], ["Received", bytes(device.bytes_down ?? 0)],
      ["Outbox", `${bytes(device.outbox_bytes ?? 0)}, ${Math.round((device.outbox_fill ?? 0) * 100)} % full`],
      ["Until a receipt", device.receipt_s == null ? "–" : `${device.receipt_s < 10 ? device.receipt_s.toFixed(2) : Math.round(device.receipt_s)} s`],
      ["Reconnects", whole(device.reconnects ?? 0)],
      ["Clock", Math.abs(device.clock_off_s ?? 0) < 2 ? "right" : `${span(Math.abs(device.clock_off_s))} ${device.clock_off_s > 0 ? "ahead" : "behind"}`],
      ["Certificate", device.certificate_expires_unix_s ? `until ${new Date(device.certificate_expires_unix_s * 1000).toISOString().slice(0, 10)}` : "none"],
    ]);
    facts("d-machine", [
      ["Memory", bytes(device.rss_bytes ?? 0)], ["At most", bytes(device.peak_rss_bytes ?? 0)],
      ["Temperature", device.temperature_celsius == null ? "–" : `${device.temperature_celsius.toFixed(0)} °C`],
      ...(device.assigned ? [
        [device.assigned.heeded ? "Chosen for it" : "Chosen for it, not in use", device.assigned.words],
        ["Because", `${device.assigned.why}, ${span(now - device.assigned.since_unix_s)} ago`],
        ...(device.assigned.advised ? [["Better in tier", device.assigned.advised]] : []),
      ] : []),
      ["Software", device.software || "–"], ["Backbone", device.backbone_fingerprint ? `${device.backbone_fingerprint.slice(0, 8)}…` : "–"],
    ]);
    facts("d-weights", [
      ["Version in use", whole(device.weights_version ?? 0)], ["Published", whole(view.trainer.published ?? 0)],
      [capital(view.measure), figure(device.quality)], ["On held-out samples", whole(device.evaluation_samples ?? 0)],
    ]);
    by("d-events").replaceChildren(...eventLines(events, false));
    by("d-forget").hidden = device.online ?? false;
    by("d-forget-command").textContent = `sidestream trainer forget trainer.toml ${device.name}`;
  }
}

function facts(id, pairs) {
  by(id).replaceChildren(...pairs.map(([name, value]) => {
    const pair = node("div");
    pair.append(node("dt", "", name), node("dd", "", value));
    return pair;
  }));
}

export function eventLines(events, named) {
  return events.map((event) => {
    const line = node("li", `event ${event.kind}`);
    const times = (event.count ?? 1) > 1 ? ` (${whole(event.count)} times)` : "";
    const when = node("time", "", clock(event.at_unix_s, true));
    when.dateTime = new Date(event.at_unix_s * 1000).toISOString();
    when.title = new Date(event.at_unix_s * 1000).toLocaleString("en-GB");
    line.append(when, node("b", "", named ? event.device || "trainer" : ""), node("span", "", `${event.words}${times}`));
    return line;
  });
}
