// Makes this node a replica set of one, whose member is reached by its name in the cluster. Run again, it does nothing.
const host = process.env.MEMBER || "mongodb-0.mongodb:27017";
try {
  rs.initiate({ _id: "rs0", members: [{ _id: 0, host }] });
} catch (error) {
  if (error.codeName !== "AlreadyInitialized") throw error;
}
while (!db.hello().isWritablePrimary) sleep(200);
print(`${host} accepts writes`);
