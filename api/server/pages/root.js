// What the server says of its health.
import { element } from "./key.js";

const health = await (await fetch("/health", { cache: "no-store" })).json();
const facts = {
  model: health.model,
  "beside it": health.variants.join(", ") || "no other model",
  dtype: health.dtype,
  backend: health.backend,
  exact: health.exact ? "yes: cached and computed answers agree bit for bit" : `no: ${health.inexact.join("; ")}`,
  version: health.version,
};
document.querySelector("#state").textContent = health.status;
document
  .querySelector("#facts tbody")
  .replaceChildren(...Object.entries(facts).map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value))));
