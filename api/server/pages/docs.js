// The routes, as the server describes them.
import { Refused, ask, askForKey, element } from "./key.js";

async function begin() {
  const state = document.querySelector("#state");
  try {
    const described = await (await ask("/openapi.json")).json();
    const groups = new Map();
    for (const [path, methods] of Object.entries(described.paths)) {
      for (const [method, route] of Object.entries(methods)) {
        const group = route.tags?.[0] ?? "Other";
        if (!groups.has(group)) groups.set(group, []);
        groups.get(group).push([`${method.toUpperCase()} ${path}`, route.description ?? route.summary ?? ""]);
      }
    }
    const sections = [...groups].map(([group, routes]) => {
      const lines = routes.map(([name, text]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, text)));
      return element("section", {}, element("h2", {}, group), element("table", {}, element("tbody", {}, ...lines)));
    });
    document.querySelector("#routes").replaceChildren(...sections);
    state.textContent = described.info.version;
  } catch (error) {
    state.textContent = error.message;
    if (error instanceof Refused && error.status === 401) askForKey(begin);
  }
}

begin();
